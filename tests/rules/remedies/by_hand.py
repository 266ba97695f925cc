"""Rules whose fix no program can apply to a script, and why."""

_LOADED_ANEW = "the base has to be loaded anew from its files"
_VALUES_ARE_LOST = "the values are lost; only a checkpoint of the user's has them"
_ORDER = "two calls of the user's code have to change places, or one has to go"

_LOSS_FUNCTION = "the loss function, or the loop around it, is the user's own code"
_DATA = "the code that makes the data is the user's own"

BY_HAND: dict[str, str] = {
    "LORA130": _LOADED_ANEW,
    "LORA205": _ORDER,
    "LORA207": _VALUES_ARE_LOST,
    "LORA208": _LOADED_ANEW,
    "LORA212": _ORDER,
    "LORA220": _LOADED_ANEW,
    "LORA221": _LOADED_ANEW,
    "LORA223": _LOADED_ANEW,
    "LORA225": "the training, or the file that was meant, has to be found",
    "LORA226": "the training, or the file that was meant, has to be found",
    "LORA230": _ORDER,
    "LORA233": _ORDER,
    "LORA234": _ORDER,
    "LORA237": _VALUES_ARE_LOST,
    "LORA239": _ORDER,
    "LORA310": _VALUES_ARE_LOST,
    "LORA311": _LOSS_FUNCTION,
    "LORA312": _LOSS_FUNCTION,
    "LORA314": _LOSS_FUNCTION,
    "LORA317": _ORDER,
    "LORA320": _DATA,
    "LORA325": _LOSS_FUNCTION,
    "LORA328": _DATA,
    "LORA334": _LOADED_ANEW,
    "LORA338": "it is an info that asks for no change",
}
