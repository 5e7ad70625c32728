"""Code that every room uses. Import it before transformers: it filters log lines of other libraries that are of no use here."""

import logging

# transformers imports torchao wherever it is installed, although no model here is quantised by it. torchao then complains of
# compiled parts for other machines, and torch complains of an enum in torchao. Neither line is of use to a reader.
_NOISE = {"torchao": ("Failed to load", "Skipping import of cpp"), "torch.utils._pytree": ("%s is an Enum subclass",)}


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_is_of_use)
