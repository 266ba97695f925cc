"""Who looks: torch, PEFT and bitsandbytes objects in, facts out. Nothing is judged here."""
