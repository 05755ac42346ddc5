# proxsmtpd: nothing is compiled; this tries, checks and installs it.
#
#   make demo                                    see it work
#   make check                                   run the tests
#   make soak                                    run it for minutes (MINUTES=3)
#   make bench                                   measure it (needs proxsmtp, postfix)
#   make install                                 into /usr/local
#   make unit                                    the systemd unit as well
#   make install PREFIX=/usr SYSCONFDIR=/etc     where Debian's package has it
#   make uninstall                               except the configuration
#
# It needs Python 3.9 or later as $(PYTHON), and no more than a POSIX make.
.POSIX:

PYTHON = python3
PREFIX = /usr/local
SBINDIR = $(PREFIX)/sbin
SYSCONFDIR = $(PREFIX)/etc
MANDIR = $(PREFIX)/share/man
UNITDIR = $(PREFIX)/lib/systemd/system
DESTDIR =
PYTEST_ARGS =
JOBS = --numprocesses 8 --dist loadgroup
BENCH_ARGS =
MINUTES = 3
# This is there while systemd runs the machine.
SYSTEMD = /run/systemd/system

MANUALS = proxsmtpd.8 proxsmtpd.conf.5
VENV = .venv
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Bounded, so that a new release does not fail an old tree; mypy 2 cannot check for
# Python 3.9 any more.
PYTEST = 'pytest>=8,<10' 'pytest-xdist>=3.5,<4'
LINTERS = 'ruff>=0.17,<0.18' 'mypy>=1.18,<2'

PROGRAM_PATH = $(DESTDIR)$(SBINDIR)/proxsmtpd
CONFIG_PATH = $(DESTDIR)$(SYSCONFDIR)/proxsmtpd.conf
MAN8_PATH = $(DESTDIR)$(MANDIR)/man8/proxsmtpd.8
MAN5_PATH = $(DESTDIR)$(MANDIR)/man5/proxsmtpd.conf.5
UNIT_PATH = $(DESTDIR)$(UNITDIR)/proxsmtpd.service
# The recipes have these in single quotes.  Each make exports what its command line sets.
REFUSE_QUOTES = for name in DESTDIR PREFIX SBINDIR SYSCONFDIR MANDIR UNITDIR PYTHON \
	JOBS; do \
	eval "value=\$$$$name"; \
	case $$value in *\'*) \
	    echo "$$name must not contain a single quote: $$value" >&2; exit 1 ;; \
	esac; done
# No blank can be in a program's first line, and no more than 255 octets of it count.
CHECK_PYTHON = '$(PYTHON)' -c 'import os, sys; python = sys.executable; \
	sys.version_info < (3, 9) and \
	sys.exit(python + " is older than Python 3.9: set PYTHON"); \
	len(python.split()) != 1 and \
	sys.exit("a \#! line cannot name %r, which has a blank: set PYTHON" % python); \
	len(os.fsencode(python)) > 247 and \
	sys.exit("a \#! line cannot name so long a path: %s: set PYTHON" % python)'
# By execv: a shell would take for its own script what the system cannot run.
RUN_NEW = '$(PYTHON)' -c 'import os, sys; sys.tracebacklimit = 0; \
	os.execv(sys.argv[1], sys.argv[1:])' "$$2.new" -v </dev/null | \
	grep -F '(config: $(SYSCONFDIR)/proxsmtpd.conf)' >/dev/null
SET_PATHS = -e 's|/usr/local/etc|$(SYSCONFDIR)|g' -e 's|/usr/local/sbin|$(SBINDIR)|g'
# The display of proxsmtpd(8) that is a whole unit of Type=notify.
PRINT_UNIT = awk '/^\.Bd/ { text = ""; next } { text = text $$0 "\n" } \
	/^\.Ed/ && text ~ /^\[Unit\]/ && text ~ /Type=notify/ { \
	    sub(/\.Ed\n$$/, "", text); printf "%s", text }' proxsmtpd.8

all:
	@echo 'Nothing needs to be built. Try: make demo, make check, make install'

demo:
	@PYTHONPATH=test/support $(PYTHON) test/tools/demo.py

# Side by side where pytest-xdist is there or can be had, else one after the other.
# Without byte code each of the processes would compile all tests again.
check:
	@$(REFUSE_QUOTES)
	@if $(PYTHON) -c 'import pytest, xdist' 2>/dev/null; then python='$(PYTHON)'; \
	elif $(MAKE) $(VENV)/bin/pytest; then python=$(VENV)/bin/python; \
	else python='$(PYTHON)'; fi && \
	if "$$python" -c 'import xdist' 2>/dev/null; then jobs='$(JOBS)'; fi && \
	PYTHONDONTWRITEBYTECODE= "$$python" -m pytest $$jobs $(PYTEST_ARGS)

soak:
	@PYTHONPATH=test/support $(PYTHON) test/tools/soak.py $(MINUTES)

bench:
	@$(PYTHON) test/tools/bench/bench.py $(BENCH_ARGS)

# The program is checked as Python 3.9 reads it; with the tests, as this Python does,
# since what pytest itself imports need not be written for 3.9.
lint: $(VENV)/bin/pytest $(VENV)/bin/ruff
	$(VENV)/bin/ruff check proxsmtpd.py test
	$(VENV)/bin/ruff format --check proxsmtpd.py test
	$(VENV)/bin/mypy --python-version 3.9 proxsmtpd.py
	$(VENV)/bin/mypy proxsmtpd.py test
	@command -v mandoc >/dev/null || { echo 'lint needs mandoc' >&2; exit 1; }
	! mandoc -T lint $(MANUALS) 2>&1 | \
	grep -v -e 'referenced manual not found' -e 'outdated mandoc.db'

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo '$(PYTHON) cannot make a virtual environment: install python3-venv' \
	'(for make check, pytest for $(PYTHON) will do)' >&2; exit 1; }

$(VENV)/bin/pytest: $(VENV)/bin/python
	$(PIP_INSTALL) $(PYTEST)

$(VENV)/bin/ruff: $(VENV)/bin/python
	$(PIP_INSTALL) $(LINTERS)

# The program's first line names the interpreter itself: with env(1) the process
# would be called python3, and pgrep -x and killproc would miss it. -IS keeps the
# environment's PYTHON variables and site-packages out of a mail daemon.  Each file is
# written beside its place, and the program run, before it is moved there.  man(1)
# prefers compressed pages, which the original's would be.  Below /usr the program takes
# the place of Debian's, whose unit and init script read /etc/proxsmtp/*.conf: nobody
# would read the first configuration.
install:
	@$(REFUSE_QUOTES)
	@$(CHECK_PYTHON)
	@set -e; \
	put() { \
	    sed -e "$$3" $(SET_PATHS) "$$1" >"$$2.new" && chmod "$$4" "$$2.new" && \
	    if test -x "$$2.new"; then $(RUN_NEW) || \
	        { echo "$$2.new -v: fails, or has another configuration" >&2; false; }; \
	    fi && mv -f "$$2.new" "$$2" || \
	    { rm -f "$$2.new"; echo "not installed: $$2" >&2; exit 1; }; \
	    echo "installed $$2"; \
	}; \
	for directory in '$(DESTDIR)$(SBINDIR)' '$(DESTDIR)$(SYSCONFDIR)' \
	    '$(DESTDIR)$(MANDIR)/man8' '$(DESTDIR)$(MANDIR)/man5'; do \
	    test -d "$$directory" || install -d -m 755 "$$directory"; \
	done; \
	python=$$('$(PYTHON)' -c 'import re, sys; \
	print(re.sub(r"([|&\\])", r"\\\1", sys.executable))'); \
	put proxsmtpd.py '$(PROGRAM_PATH)' "1s|.*|#!$$python -IS|" 755; \
	put proxsmtpd.8 '$(MAN8_PATH)' '' 644; \
	put proxsmtpd.conf.5 '$(MAN5_PATH)' '' 644; \
	rm -f '$(MAN8_PATH).gz' '$(MAN5_PATH).gz'; \
	put proxsmtpd.conf.sample '$(CONFIG_PATH).sample' '' 644; \
	test '$(PREFIX)' = /usr || test -e '$(CONFIG_PATH)' || test -h '$(CONFIG_PATH)' || \
	    put proxsmtpd.conf.sample '$(CONFIG_PATH)' '' 644
	@if test -d '$(SYSTEMD)'; \
	then start='make unit && systemctl enable --now proxsmtpd'; \
	else start='$(SBINDIR)/proxsmtpd, or the init script in proxsmtpd(8)'; fi; \
	if test '$(PREFIX)' = /usr; \
	then config='/etc/proxsmtp/*.conf (-f FILE)'; \
	    start='service proxsmtp restart'; \
	else config='$(SYSCONFDIR)/proxsmtpd.conf'; fi; \
	echo '1. Add the user _proxsmtp and /var/spool/proxsmtpd: see README, INSTALL IT'; \
	echo "2. Edit $$config, and check it: proxsmtpd -t"; \
	echo "3. Start it: $$start"

unit:
	@$(REFUSE_QUOTES)
	@test -d '$(DESTDIR)$(UNITDIR)' || install -d -m 755 '$(DESTDIR)$(UNITDIR)'
	@$(PRINT_UNIT) | sed $(SET_PATHS) >'$(UNIT_PATH)'
	@chmod 644 '$(UNIT_PATH)'
	@echo 'installed $(UNIT_PATH)'

# The configuration stays: it is the administrator's.
uninstall:
	@$(REFUSE_QUOTES)
	rm -f '$(PROGRAM_PATH)' '$(MAN8_PATH)' '$(MAN5_PATH)' '$(CONFIG_PATH).sample' \
	    '$(UNIT_PATH)'

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache proxsmtpd-*.tar.gz
	find . -name __pycache__ -prune -exec rm -rf {} +

dist:
	version=$$(sed -n 's/^VERSION = "\(.*\)"$$/\1/p' proxsmtpd.py) && \
	git archive --format=tar.gz --prefix="proxsmtpd-$$version/" \
	-o "proxsmtpd-$$version.tar.gz" HEAD
