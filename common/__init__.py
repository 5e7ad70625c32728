"""Code that every room uses. Import it before transformers: it turns off code from the hub, and useless log lines of other libraries."""

import logging
import os

# transformers 5.25 requires the package `kernels`, and by default replaces layers of every model that it loads by code that it
# downloads. It reads this variable before it loads a model, and earlier versions when they are imported.
os.environ["USE_HUB_KERNELS"] = "NO"

# transformers imports torchao wherever it is installed, although no model here is quantised by it. torchao then complains of
# compiled parts for other machines, and torch complains of an enum in torchao. Neither line is of use to a reader.
_NOISE = {
    "torchao": ("Failed to load", "Skipping import of cpp"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "transformers.integrations.hub_kernels": ("kernels hub usage is disabled",),
}


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_is_of_use)
