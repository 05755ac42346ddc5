# proxsmtpd: nothing is compiled; this tries, checks and installs it.
#
#   make demo                                    see it work
#   make check                                   run the tests
#   make soak                                    run it for minutes (MINUTES=3)
#   make bench                                   measure it (needs proxsmtp, postfix)
#   make install                                 into /usr/local
#   make install PREFIX=/usr SYSCONFDIR=/etc     where Debian's package has it
#
# It needs Python 3.9 or later as $(PYTHON), and no more than a POSIX make.
.POSIX:

PYTHON = python3
PREFIX = /usr/local
SBINDIR = $(PREFIX)/sbin
SYSCONFDIR = $(PREFIX)/etc
MANDIR = $(PREFIX)/share/man
DESTDIR =
PYTEST_ARGS =
BENCH_ARGS =
MINUTES = 3

MANUALS = proxsmtpd.8 proxsmtpd.conf.5
VENV = .venv
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Bounded, so that a new release does not fail an old tree; mypy 2 cannot check for
# Python 3.9 any more.
PYTEST = 'pytest>=8,<10'
LINTERS = 'ruff>=0.17,<0.18' 'mypy>=1.18,<2'

PROGRAM_PATH = $(DESTDIR)$(SBINDIR)/proxsmtpd
CONFIG_PATH = $(DESTDIR)$(SYSCONFDIR)/proxsmtpd.conf
MAN8_PATH = $(DESTDIR)$(MANDIR)/man8/proxsmtpd.8
MAN5_PATH = $(DESTDIR)$(MANDIR)/man5/proxsmtpd.conf.5
SET_PATHS = -e 's|/usr/local/etc|$(SYSCONFDIR)|g' -e 's|/usr/local/sbin|$(SBINDIR)|g'

all:
	@echo 'Nothing needs to be built. Try: make demo, make check, make install'

demo:
	@$(PYTHON) test/demo.py

check:
	@if $(PYTHON) -c 'import pytest' 2>/dev/null; then python='$(PYTHON)'; \
	else $(MAKE) $(VENV)/bin/pytest && python=$(VENV)/bin/python; fi && \
	"$$python" -m pytest $(PYTEST_ARGS)

soak:
	@$(PYTHON) test/soak.py $(MINUTES)

bench:
	@$(PYTHON) test/bench/bench.py $(BENCH_ARGS)

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
# environment's PYTHON variables and site-packages out of a mail daemon.  man(1)
# prefers compressed pages, which the original's would be.
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and \
	sys.executable + " is older than Python 3.9: set PYTHON")'
	install -d -m 755 '$(DESTDIR)$(SBINDIR)' '$(DESTDIR)$(SYSCONFDIR)' \
	'$(DESTDIR)$(MANDIR)/man8' '$(DESTDIR)$(MANDIR)/man5'
	rm -f '$(PROGRAM_PATH)'
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)') && \
	sed -e "1s|.*|#!$$python -IS|" $(SET_PATHS) proxsmtpd.py >'$(PROGRAM_PATH)'
	chmod 755 '$(PROGRAM_PATH)'
	rm -f '$(MAN8_PATH).gz' '$(MAN5_PATH).gz'
	sed $(SET_PATHS) proxsmtpd.8 >'$(MAN8_PATH)'
	sed $(SET_PATHS) proxsmtpd.conf.5 >'$(MAN5_PATH)'
	sed $(SET_PATHS) proxsmtpd.conf.sample >'$(CONFIG_PATH).sample'
	chmod 644 '$(MAN8_PATH)' '$(MAN5_PATH)' '$(CONFIG_PATH).sample'
	test -e '$(CONFIG_PATH)' || cp -p '$(CONFIG_PATH).sample' '$(CONFIG_PATH)'

# The configuration stays: it is the administrator's.
uninstall:
	rm -f '$(PROGRAM_PATH)' '$(MAN8_PATH)' '$(MAN5_PATH)' '$(CONFIG_PATH).sample'

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache proxsmtpd-*.tar.gz
	find . -name __pycache__ -prune -exec rm -rf {} +

dist:
	version=$$(sed -n 's/^VERSION = "\(.*\)"$$/\1/p' proxsmtpd.py) && \
	git archive --format=tar.gz --prefix="proxsmtpd-$$version/" \
	-o "proxsmtpd-$$version.tar.gz" HEAD
