"""What stands behind the scripts: text, tokens, checkpoints, logs, models of other projects."""
