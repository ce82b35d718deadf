"""Compares the modes of SCR on held-out images: answers, fidelity, cost."""
