"""What the tests share: problems, models, oracles, tolerances, and programs that tests run as processes."""
