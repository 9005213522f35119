"""Prompts, videos and preference pairs that training reads."""
