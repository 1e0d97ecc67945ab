"""Whose turn it is in the line of a named shell."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('devboxes', '0004_logs'),
        ('executions', '0003_phases'),
        ('hosts', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='ShellLine',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('name', models.TextField()),
                ('last_place', models.BigIntegerField()),
            ],
        ),
        migrations.AddField(
            model_name='execution',
            name='shell_place',
            field=models.BigIntegerField(blank=True, help_text='Its place in the line of its shell.', null=True),
        ),
        migrations.AddIndex(
            model_name='execution',
            index=models.Index(condition=models.Q(('completed_at__isnull', True), ('shell_name__isnull', False)), fields=['devbox', 'shell_name', 'shell_place'], name='executions_line'),
        ),
        migrations.AddField(
            model_name='shellline',
            name='devbox',
            field=models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='shell_lines', to='devboxes.devbox'),
        ),
        migrations.AddConstraint(
            model_name='shellline',
            constraint=models.UniqueConstraint(fields=('devbox', 'name'), name='executions_shellline_once'),
        ),
    ]
