"""Several trained models on one test: statistics, tables, figures and a page. scripts/compare.py starts here."""
