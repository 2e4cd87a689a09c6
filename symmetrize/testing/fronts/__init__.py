"""Front ends in Python: reports, assertions, parametrized tests."""
