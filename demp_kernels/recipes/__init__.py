"""The programs behind the command line: models, data, the training loop, the report."""
