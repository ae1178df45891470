"""Train and measure the adapters behind the paper's tables on the bundled models."""
