"""The config as pydantic models: source of config.yaml, JSON schema and reference."""
