"""The supervisor's desk: bank reports in, checked findings and checked letters out (docs/xbrl.md)."""
