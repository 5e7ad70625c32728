from common.errors import REQUIREMENTS

REQUIREMENTS |= dict.fromkeys(("arelle", "lxml", "sklearn"), "requirements-xbrl.txt")
