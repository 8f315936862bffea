"""What a benchmark times, lane by lane: engines, what they are compared to, and the stages alone."""
