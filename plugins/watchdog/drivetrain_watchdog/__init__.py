"""Where every process of a run stands when it makes no progress."""
