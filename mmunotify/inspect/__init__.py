"""Looking at what happened: reports of replays."""
