"""The voting page: people choose among pictures, and a vote file keeps what they chose."""
