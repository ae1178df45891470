"""The paper's tables on the bundled models: which adapters are trained, and what they are worth."""
