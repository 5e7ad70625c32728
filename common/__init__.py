"""What every room uses. Every program imports it before a model of transformers: what other libraries say is filtered here."""

import logging

# transformers imports torchao wherever it is installed, and no model here is quantised by it. torchao then complains of
# compiled parts that are made for other machines, and torch of an enum of torchao's. Neither is of use to a reader.
_NOISE = {"torchao": ("Failed to load", "Skipping import of cpp"), "torch.utils._pytree": ("%s is an Enum subclass",)}


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_is_of_use)
