"""What training layer by layer consists of: blocks, tasks, the contract of a rule, the engine."""
