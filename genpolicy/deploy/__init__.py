"""Deployment: export, the runtime that needs no torch, the real-time controller and serving."""
