"""Simulated patients: anatomy (a map of tissues), then imaging (what a scanner makes of it)."""
