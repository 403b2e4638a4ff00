"""Exact evaluation, intervals of accuracies, and the ledger of evaluations on test sets."""
