"""What crosses HTTP: requests as pydantic models, responses as plain dataclasses and structs."""
