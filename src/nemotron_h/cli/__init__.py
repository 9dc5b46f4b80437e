"""The command `nemotron-h`: one file per verb, whose imports happen when it is asked."""
