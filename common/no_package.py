"""The build backend in pyproject.toml. Its only purpose is to refuse `pip install .` with a sentence."""

raise SystemExit(
    "error: this repository is a checkout and not a package; install its requirements with `pip install -r requirements.txt` "
    "and run its scripts from the repository's root (README.md)"
)
