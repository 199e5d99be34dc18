"""The Python front door: what `import lowrank` offers. Thin: each function is a pipeline with the settings as people
write them in Python. `lowrank/__init__.py` has the list, docs/api.md the page."""
