"""All that a run reads and writes: text, tokens, checkpoints, logs, and the models of other projects."""
