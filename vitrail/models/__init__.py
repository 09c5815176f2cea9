"""Networks: one family, one file; `registry` finds them by name."""
