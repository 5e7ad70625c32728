"""Read the tables that are printed."""


def cells(text: str, name: str) -> list[str]:
    """The cells of the first row that starts with `name`."""
    row = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in row.split("  ") if cell.strip()]
