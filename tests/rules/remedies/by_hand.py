"""Rules whose fix no program can apply to a script, and why."""

from __future__ import annotations

from pytest_lora.rules import Rule

_LOADED_ANEW = "the base has to be loaded anew from its files"
_LOADED_ELSEWHERE = "the example takes a base that is there already; cases that load theirs are mended"
_VALUES_ARE_LOST = "the values are lost; only a checkpoint of the user's has them"
_ORDER = "two calls of the user's code have to change places, or one has to go"

_LOSS_FUNCTION = "the loss function, or the loop around it, is the user's own code"
_DATA = "the code that makes the data is the user's own"

_FILE = "the file has to be saved, fetched or converted again"
_OTHER_FILES = "files of the folder have to be moved or removed"
_TRAINING_KNOWS = "only the training knows the value"
_OTHER_BASE = "the base that the adapter was trained on has to be loaded"

_LIBRARY = "the fault is in code of the library, or in code put into it"
_SET_BY_HAND = "the model was changed by the user's own code"

BY_HAND: dict[str, str] = {
    "LORA130": _LOADED_ANEW,
    "LORA205": _ORDER,
    "LORA207": _VALUES_ARE_LOST,
    "LORA208": _LOADED_ANEW,
    "LORA212": _ORDER,
    "LORA220": _LOADED_ANEW,
    "LORA221": _LOADED_ELSEWHERE,
    "LORA223": _LOADED_ELSEWHERE,
    "LORA225": "the training, or the file that was meant, has to be found",
    "LORA226": "the training, or the file that was meant, has to be found",
    "LORA230": _ORDER,
    "LORA233": _ORDER,
    "LORA234": _ORDER,
    "LORA237": _VALUES_ARE_LOST,
    "LORA239": _ORDER,
    "LORA241": _VALUES_ARE_LOST,
    "LORA242": _SET_BY_HAND,
    "LORA243": _FILE,
    "LORA244": _SET_BY_HAND,
    "LORA247": _ORDER,
    "LORA246": "the adapter has to be converted, or to get a base of its own",
    "LORA310": _VALUES_ARE_LOST,
    "LORA311": _LOSS_FUNCTION,
    "LORA312": _LOSS_FUNCTION,
    "LORA314": _LOSS_FUNCTION,
    "LORA320": _DATA,
    "LORA325": _LOSS_FUNCTION,
    "LORA328": _DATA,
    "LORA334": _LOADED_ANEW,
    "LORA338": "it is an info that asks for no change",
    "LORA361": _DATA,
    "LORA363": _DATA,
    "LORA365": "the state of the optimizer has to be loaded from its file",
    "LORA372": _ORDER,
    "LORA373": _DATA,
    "LORA401": _FILE,
    "LORA402": _FILE,
    "LORA404": _FILE,
    "LORA405": _OTHER_FILES,
    "LORA406": _OTHER_FILES,
    "LORA407": _FILE,
    "LORA411": _FILE,
    "LORA412": _FILE,
    "LORA413": _TRAINING_KNOWS,
    "LORA414": _TRAINING_KNOWS,
    "LORA415": "it is an info that asks for no change",
    "LORA421": _FILE,
    "LORA423": _FILE,
    "LORA424": _FILE,
    "LORA425": _OTHER_BASE,
    "LORA426": _FILE,
    "LORA428": _FILE,
    "LORA429": _FILE,
    "LORA432": _FILE,
    "LORA433": _OTHER_BASE,
    "LORA435": _FILE,
    "LORA441": _VALUES_ARE_LOST,
    "LORA442": _VALUES_ARE_LOST,
    "LORA443": _FILE,
    "LORA444": _VALUES_ARE_LOST,
    "LORA445": _FILE,
    "LORA451": _OTHER_BASE,
    "LORA452": _TRAINING_KNOWS,
    "LORA461": _FILE,
    "LORA462": _FILE,
    "LORA464": "the server is started by a command of the user's",
    "LORA465": _FILE,
    "LORA506": "the step has to be measured",
    "LORA601": "what a broken line should say, only its writer knows",
    "LORA903": _SET_BY_HAND,
    "LORA910": _SET_BY_HAND,
    "LORA912": _SET_BY_HAND,
    "LORA913": _VALUES_ARE_LOST,
    "LORA914": _OTHER_BASE,
    "LORA915": "the cause has to be found first; the rules on a model name it",
    "LORA916": _LOADED_ANEW,
    "LORA917": _LIBRARY,
    "LORA918": _LIBRARY,
    "LORA919": "the adapter has to be trained anew",
    "LORA925": _FILE,
    "LORA930": _LIBRARY,
    "LORA931": _LIBRARY,
    "LORA932": _LIBRARY,
    "LORA933": _LIBRARY,
    "LORA934": _LIBRARY,
    "LORA942": "",  # unlike the others of its stage
    "LORA950": _LOSS_FUNCTION,
}

STAGES_BY_HAND = {
    "history": "the run is over; only the next one shows what a change does",
    "sweep": "the sweep is over; only the next one shows what a change does",
}
"""Stages of which no fix can be applied, and why."""


def by_hand(known: Rule) -> str | None:
    """Why the fix of a rule can not be applied by a program; None where it can."""
    return BY_HAND.get(known.code, STAGES_BY_HAND.get(known.stage)) or None
