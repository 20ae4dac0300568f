"""What a training costs before it starts: parameters, arithmetic, memory and time, on this CPU or on another machine."""
