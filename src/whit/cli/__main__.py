from whit.cli import main

main()
