"""Generated from protos/trivium/v1; never edited. `make proto` writes it."""
