"""attent inside other people's trainers, one module each; imports what it is named after, and nothing imports it."""
