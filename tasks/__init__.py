"""One Prefect task a stage: resolve inputs, launch, publish; no maths."""
