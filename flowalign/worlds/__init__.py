"""The worlds that the bundled models were trained on."""
