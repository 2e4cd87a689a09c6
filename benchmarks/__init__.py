"""What symmetrisation costs and what it does to smoothness, recorded: ``python -m benchmarks``, see README.md.

Nothing here decides whether something is good enough; that is what the tests are for.
"""
