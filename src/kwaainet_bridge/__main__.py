from kwaainet_bridge.cli import main

main()
