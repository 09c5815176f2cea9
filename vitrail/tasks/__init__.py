"""What an output means: loss, decode, metrics. No network lives here."""
