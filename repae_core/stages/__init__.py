"""The work of each stage that does not train, from artifacts to artifacts; no orchestrator needed."""
