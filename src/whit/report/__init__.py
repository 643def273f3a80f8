"""What was measured, side by side.

`candidates` are what can be compared, `comparison` and `runs` make and measure them, each by `work` in a process of its
own, `turns` times them in turns, `sweep` adds a range of sizes; `tables`, `pictures`, `figures` and `page` show it.
"""
