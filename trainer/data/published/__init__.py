"""Published data sets: downloaded or imported, verified and decoded."""
