"""From play to fine-tuned policies: stages that are skipped while what they were made from stays the same."""
