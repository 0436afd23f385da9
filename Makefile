.PHONY: quality style test test-all

quality:
	ruff check .
	ruff format --check .

style:
	ruff check --fix .
	ruff format .

test:
	python -m pytest -m "not slow"

test-all:
	python -m pytest
