#!/bin/sh
# Turns the Debian package index into JSON lines {"key","value"}: real records of 200 B to 30 KB.
#
#   apt-get update && bench/corpus.sh > packages.jsonl
#   annulus import packages.jsonl
#
# The key is the package's name; a second record of the same name gets "=VERSION" behind it, and
# where that is taken too, "#2" and so on. The value is the record's text, without the empty line
# that ends it. The order is that of the lists' names, so equal lists give equal bytes.
#
# LISTS: directory of apt's lists, /var/lib/apt/lists by default. Needs apt and any awk.
set -eu

lists=${LISTS:-/var/lib/apt/lists}

# apt keeps lists plain or compressed as it is configured; its own helper reads all forms.
read_list() {
    case $1 in
    *.xz | *.lz4 | *.gz | *.bz2 | *.zst | *.lzma) /usr/lib/apt/apt-helper cat-file "$1" ;;
    *) cat "$1" ;;
    esac
}

set --
for list in "$lists"/*_Packages "$lists"/*_Packages.*; do
    if [ -f "$list" ]; then set -- "$@" "$list"; fi
done
if [ $# -eq 0 ]; then
    echo "corpus.sh: no package lists in $lists: run apt-get update first" >&2
    exit 1
fi

# Byte by byte, whatever the locale.
LC_ALL=C
export LC_ALL

for list in "$@"; do
    read_list "$list"
    echo
done | awk '
    BEGIN {
        RS = ""
        FS = "\n"
        for (i = 1; i < 32; i++) control[sprintf("%c", i)] = sprintf("\\u%04x", i)
    }

    # Text as it stands between the quotes of a JSON string.
    function json(text,    out, i, c) {
        # A backslash and what was found: the one form on which all awks agree.
        gsub(/[\\"]/, "\\\\&", text)
        gsub(/\n/, "\\n", text)
        gsub(/\t/, "\\t", text)
        if (text !~ /[\001-\037]/) return text
        out = ""
        for (i = 1; i <= length(text); i++) {
            c = substr(text, i, 1)
            out = out (c in control ? control[c] : c)
        }
        return out
    }

    {
        name = version = ""
        for (i = 1; i <= NF && (name == "" || version == ""); i++) {
            if ($i ~ /^Package: /) name = substr($i, 10)
            else if ($i ~ /^Version: /) version = substr($i, 10)
        }
        if (name == "") next
        key = name
        if (key in seen) key = name "=" version
        for (n = 2; key in seen; n++) key = name "=" version "#" n
        seen[key] = 1
        printf "{\"key\":\"%s\",\"value\":\"%s\"}\n", json(key), json($0)
        count++
    }

    END { print "corpus.sh: " count + 0 " records" > "/dev/stderr" }
'
