"""REPA-E as a plain library: models, losses, samplers, data and artifacts; no orchestrator inside."""
