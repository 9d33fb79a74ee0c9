"""Speed, against dense and against the measured limit of the machine."""
