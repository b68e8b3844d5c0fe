"""Judging default rules on models they have never seen: real modules of ordinary size, each trained from scratch."""
