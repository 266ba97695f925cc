"""What a user asks of GPU memory: estimate, budget, what-if, frontier. How a step is traced is in inspection/memory."""
