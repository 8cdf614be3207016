"""Ranks and what passes between them: layout, all-to-all, balance of experts, ZeRO, checkpoints."""
